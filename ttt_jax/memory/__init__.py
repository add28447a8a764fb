"""What a stream taught, as a thing of its own: kept, added, subtracted, put into other engines."""
