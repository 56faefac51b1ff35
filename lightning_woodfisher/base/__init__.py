"""Errors, checks of settings, byte sizes, text tables, clocks and types for every folder.

Nothing here knows networks, data or ranks, so this folder imports no other folder of the
package.
"""
