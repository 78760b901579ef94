"""The papers' analyses of what was learned: pictures and numbers to look at, none of which changes an artifact."""
