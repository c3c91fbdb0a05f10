"""Other people's checkpoints, in and out: tensors renamed and reshaped, configurations translated."""
