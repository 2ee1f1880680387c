"""The verb *bench*: a zoo of small clean and backdoored networks, and how detectors and repairs do on it."""
