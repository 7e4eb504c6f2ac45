"""From a trained network and images to a folder of fused masks."""
