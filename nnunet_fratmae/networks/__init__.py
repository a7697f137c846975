"""Networks as plain torch modules; axes (B, C, H, W, D) = batch, channel, AP, LR, SI."""
