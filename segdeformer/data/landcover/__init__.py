"""The data set that ships with the program: the Earth and its land cover. See PROVENANCE.md."""
