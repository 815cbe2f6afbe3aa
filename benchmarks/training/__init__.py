"""What the demo and the reproductions share: text, the training loop, the terminal."""
