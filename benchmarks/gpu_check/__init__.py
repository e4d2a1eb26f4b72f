"""What tools/gpu_check.py runs: checks of the GPU path and measurements of its parts."""
