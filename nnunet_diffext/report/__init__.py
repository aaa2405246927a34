"""One self-contained HTML page about trained models: what was run, how it went, how good and how sure they are."""
