"""The contract that every pass keeps, as a test class that plug-ins inherit."""
