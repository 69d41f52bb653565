"""API words that torch, ONNX and TensorRT spell in one way, and this project with them."""

import re

BRITISH = re.compile(r"\w*(?:quanti|normali|initiali|externali|optimi|seriali|recogni)s(?:e|a|i)\w*", re.IGNORECASE)
"""Such words spelled otherwise."""
