"""What users could pick instead of Prism, each after its published law; the module names the source.

All run on the same pods, bounds, start times and seeds as Prism. Replica laws leave every pod at `full`; point laws
leave the count where it is. Parameters are those of the source unless the constructor says otherwise.
"""
