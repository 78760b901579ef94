"""The one training loop, its fixed batch, its log and what it costs."""
