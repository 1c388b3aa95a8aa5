"""From records to token ids, and to micro-batches."""
