"""Everything but the torch modules: one folder an idea, imported in one direction only.

common <- data <- items <- prepare and training <- run <- analysis
"""
