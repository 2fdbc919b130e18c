"""Contract suites and tiny models for tests, also for plug-ins."""
