"""The ground floor: what all rooms use, and nothing that knows of PET/CT."""
