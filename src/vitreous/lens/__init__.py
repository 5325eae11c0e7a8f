"""Looking: what a model attends to, as numbers and maps.

look.py                       `look`: from a model and images to a reading
views.py                      images as a model sees them
tap/, places/                 every attention of any model while it happens, and where its tokens are
measures.py, sweep.py         attention reduced to numbers; their formulas: indicators.py, spectra.py
sight.py, gallery.py          what each layer shows on the grid, and its maps; their formulas: maps.py
direction.py, foreground.py   where the subject is, without masks
judgement.py                  how good maps are: against masks (scores.py), against the model (faithfulness.py)
reading.py, description.py    the reading, its folder, and what it says of itself
"""
