"""The papers' analyses of what was learned: images and numbers to look at, none of which changes an artifact."""
