"""What people look at: pictures, curves, live sinks and ``report.html``."""
