"""What a run leaves for people: held-out pictures, the summary, and one HTML page.

kept.py and summary.py are called by the trainer. run.py reads a run's folder, whoever asks and
whether it has ended or not; page.py makes a page of it, several.py one of several runs, from the
charts, pictures, tables and warnings of the other files.
"""
