"""TensorRT and TensorRT-RTX: engines that run on NVIDIA GPUs, through cuda-python and without PyTorch."""
