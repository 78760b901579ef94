"""The human study: a page that asks people which of two images they prefer, and what their answers say.

design.py decides what is shown, page.py writes the page, answers.py reads what comes back, results.py counts.
"""
