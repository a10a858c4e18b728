"""Publishing: records become batches, and batches are sent until they are answered."""
