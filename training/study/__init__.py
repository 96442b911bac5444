"""Studies: many models, the same divisions of the data, one report.

A study is a file. It names models, protocols and seeds; `training.study.runner` trains what is not trained yet, and
`training.study.report` makes the tables and pictures out of what lies on disk.
"""
