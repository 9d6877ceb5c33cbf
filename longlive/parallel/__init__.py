"""The processes of a run: rank, device, random choices that all share, tensors written in parts."""
