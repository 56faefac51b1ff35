"""Find the groups of coupled channels of a network.

Input: a network and example inputs. Output: :class:`~.groups.Group` objects, plain data that
list which slices of which tensors form one structure (int64 ``[size of the axis]``), and
the masks of structures (bool, shape of the parameter). Only ``torch_pruning.py`` imports
torch-pruning. This folder must not import scores or the pruner.
"""
