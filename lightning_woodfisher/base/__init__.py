"""Errors, checks of settings, byte sizes, clocks and types that every folder uses.

Nothing here knows networks, data or ranks, so this folder imports no other folder of the
package.
"""
