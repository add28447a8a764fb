"""Models from elsewhere: Hugging Face folders read, converted and written."""
