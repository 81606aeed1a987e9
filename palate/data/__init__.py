"""Text to tokens to batches: records, the sources they are read from, columns, templates, order, the doctor."""
