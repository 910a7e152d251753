"""How long does an update of QAM take?"""
