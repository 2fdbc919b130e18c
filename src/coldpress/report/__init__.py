"""A run as one self-contained HTML page, or several side by side; made from their records alone."""
