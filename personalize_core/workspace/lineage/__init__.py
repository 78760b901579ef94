"""From any image or number to the bytes behind it: how results came to be, and what of that is still there."""
