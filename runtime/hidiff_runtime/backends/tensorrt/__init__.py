"""TensorRT and TensorRT-RTX: engines that run on NVIDIA GPUs, through cuda-python and without PyTorch.

One package for two libraries that share nearly everything; `rtx_cache` holds what only TensorRT-RTX has.
"""
