"""Figures of an artefact; `smartinit.report.figure.plot_artefact` is the way in."""
