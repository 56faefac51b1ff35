"""The command ``lightning-woodfisher``.

Input: the arguments of the command line. Output: an exit status, text and files. ``main``
has the table of subcommands, ``lightning_cli`` runs or reads ``fit``, and each other file
is one subcommand. Only ``__main__`` imports this folder.
"""
