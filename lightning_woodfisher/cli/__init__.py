"""The command ``lightning-woodfisher``.

In go the arguments of the command line; out come an exit status, text and files. ``main``
has the table of subcommands, ``lightning_cli`` runs or reads ``fit``, and each other file
is one subcommand. Nothing in the package but ``__main__`` imports this folder.
"""
