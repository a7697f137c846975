"""FratMAE for nnU-Net: networks, trainers that stock nnU-Net finds, and the bridge to pretrained encoders."""
