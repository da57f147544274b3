"""Labelled images: data sets, stable ids, splits, preprocessing, streaming."""
