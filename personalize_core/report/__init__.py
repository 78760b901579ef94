"""The report of a comparison: one page for people, and its figures and tables as files.

`evidence` reads what was made, `verdicts` says it in words, `published` lays other people's numbers beside it where
that is fair, `tables` and `figures` make what is exported, `images` chooses what is embedded, `page` writes it all.
"""
