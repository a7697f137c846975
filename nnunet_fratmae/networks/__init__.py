"""Networks as plain torch modules; axes (B, C, H, W, D) = batch, channel, AP, LR, SI."""

from nnunet_fratmae.base.command import end_stock_commands_in_one_line

end_stock_commands_in_one_line()  # here, because nnU-Net's own trainers and predictor meet no other part of ours
