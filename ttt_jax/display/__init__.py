"""What people look at: progress bars, tables on a terminal, HTML pages."""
