"""OpenVINO: the portable graphs on the CPU in float32 or bfloat16, as their engine's record says."""
