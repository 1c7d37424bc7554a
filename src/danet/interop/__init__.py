"""Other code bases' checkpoints. Their names for things appear only here."""
