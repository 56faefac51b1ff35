"""Communication between ranks: collectives, DTensors, exact sums, selection and quantiles.

Values of this rank ``[D_r]`` go in; sums, shards ``[D]`` and quantiles that are equal on
all ranks come out. Only this folder imports ``torch.distributed``. It knows neither masks
nor losses, and imports only ``base``.
"""
