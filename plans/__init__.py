"""Plans: FratMAE's settings, the extension of nnU-Net plans, the planner and the whole-body grid store."""
