"""One offline HTML page about runs, evaluations and pipelines."""
