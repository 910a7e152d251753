"""This benchmark reproduces one number of the paper: QAM at full size on two scene tasks."""
