"""Caption lists become folders of clips, here or on a Ray cluster."""
