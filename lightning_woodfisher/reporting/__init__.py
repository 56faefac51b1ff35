"""Show the reports of pruning steps: in loggers, as figures and as an HTML page.

Inputs are the reports of all steps so far and bool masks in the shapes of their parameters
(True where kept); outputs are log entries, figures and HTML. :mod:`.contents` chooses the
tables and figures, :mod:`.loggers` and :mod:`.page` write them. Only :mod:`.loggers` may
import Lightning and W&B; nothing here changes a model, and no callback is imported.
"""
