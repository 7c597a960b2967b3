"""Word lists and hand-written facts from which the demo's instruction rows are made.

Every sentence here was written for this project (Apache-2.0); nothing is taken from another work's documentation.
Values that Python can compute are not written down: the ``*_rows`` modules compute them.
"""

from __future__ import annotations

NAMES = (
    *("Ada", "Amir", "Bea", "Carlos", "Chidi", "Dana", "Elif", "Farid", "Grete", "Hana", "Igor", "Ines", "Jürgen"),
    *("Kofi", "Lena", "Łukasz", "Mara", "Mei", "Nils", "Noor", "Olga", "Priya", "Quinn", "Rosa", "Sami", "Tomás"),
    *("Uma", "Vera", "Wim", "Yuki", "Zoë"),
)

WORDS = (
    *("anchor", "basket", "bridge", "candle", "castle", "cloud", "copper", "dragon", "engine", "feather", "forest"),
    *("garden", "hammer", "harbor", "island", "jacket", "kettle", "ladder", "lantern", "marble", "meadow", "mirror"),
    *("needle", "orchard", "paper", "pencil", "pillow", "planet", "puzzle", "rabbit", "ribbon", "river", "saddle"),
    *("shadow", "sickle", "spider", "stone", "statue", "temple", "thimble", "ticket", "tunnel", "valley", "vessel"),
    *("violin", "wagon", "window", "wheel", "yarn", "zebra"),
)

CATEGORIES: dict[str, tuple[str, ...]] = {
    "fruit": (
        "apple",
        "apricot",
        "banana",
        "cherry",
        "fig",
        "grape",
        "lemon",
        "mango",
        "melon",
        "peach",
        "pear",
        "plum",
    ),
    "animal": (
        "badger",
        "camel",
        "donkey",
        "eagle",
        "fox",
        "goat",
        "heron",
        "horse",
        "otter",
        "rabbit",
        "seal",
        "wolf",
    ),
    "tool": (
        "axe",
        "chisel",
        "drill",
        "file",
        "hammer",
        "ladder",
        "pliers",
        "rake",
        "saw",
        "shovel",
        "spanner",
        "vise",
    ),
    "color": (
        "amber",
        "beige",
        "black",
        "blue",
        "brown",
        "green",
        "grey",
        "indigo",
        "orange",
        "purple",
        "red",
        "white",
    ),
    "instrument": (
        "cello",
        "clarinet",
        "drum",
        "flute",
        "guitar",
        "harp",
        "oboe",
        "organ",
        "piano",
        "trumpet",
        "viola",
    ),
    "vehicle": (
        "bicycle",
        "bus",
        "canoe",
        "car",
        "ferry",
        "lorry",
        "plane",
        "ship",
        "sledge",
        "tractor",
        "train",
        "tram",
    ),
}

OPPOSITES = (
    *(("big", "small"), ("hot", "cold"), ("fast", "slow"), ("early", "late"), ("full", "empty"), ("hard", "soft")),
    *(("high", "low"), ("light", "dark"), ("loud", "quiet"), ("new", "old"), ("open", "closed"), ("rich", "poor")),
    *(("rough", "smooth"), ("sharp", "blunt"), ("strong", "weak"), ("sweet", "bitter"), ("thick", "thin")),
    *(("wet", "dry"), ("wide", "narrow"), ("young", "old"), ("clean", "dirty"), ("deep", "shallow")),
)

PLACES = (
    "market",
    "harbor",
    "library",
    "station",
    "old mill",
    "museum",
    "garden",
    "lake",
    "workshop",
    "bakery",
    "school",
)
WEATHER = ("It rained", "The sun was out", "A cold wind blew", "Fog lay over the road", "It had snowed", "It was warm")
FINDS = (
    "a brass key",
    "an old map",
    "a lost scarf",
    "two coins",
    "a broken clock",
    "a letter without a name",
    "a kite",
)
ENDINGS = (
    "In the evening the story was told three times.",
    "Nobody knew where it came from.",
    "It went into the drawer with the other small things.",
    "The next day the owner came and said thank you.",
    "That was enough for one day.",
    "A week later it was still a riddle.",
)

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ROMAN = ((100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))
SYSTEM_MESSAGES = (
    "Answer briefly.",
    "You are a careful assistant.",
    "Answer in one or two sentences.",
    "You help with Python.",
)

# unit from, unit to, factor: exact by definition.
UNITS = (
    *(("kilometers", "meters", 1000), ("meters", "centimeters", 100), ("centimeters", "millimeters", 10)),
    *(("kilograms", "grams", 1000), ("tonnes", "kilograms", 1000), ("liters", "milliliters", 1000)),
    *(("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7)),
    *(("feet", "inches", 12), ("yards", "feet", 3), ("dozens", "pieces", 12), ("bytes", "bits", 8)),
    *(("kibibytes", "bytes", 1024), ("euros", "cents", 100), ("years", "months", 12), ("centuries", "years", 100)),
)

# callable, what it does (after "It ..."), an expression that shows it.
CALLABLES = (
    ("str.upper", "gives a copy of the text in capital letters", "'lamp'.upper()"),
    ("str.lower", "gives a copy of the text in small letters", "'LAMP'.lower()"),
    ("str.title", "gives a copy in which every word begins with a capital", "'red lamp'.title()"),
    ("str.strip", "drops the blanks at both ends of the text", "'  lamp '.strip()"),
    ("str.split", "cuts the text at a separator and gives the pieces as a list", "'a,b,c'.split(',')"),
    ("str.join", "glues strings together with the text between them", "'-'.join(['a', 'b'])"),
    ("str.replace", "swaps every occurrence of one piece of text for another", "'lamp'.replace('l', 'd')"),
    ("str.find", "gives the position of a piece of text, or -1 when it is missing", "'lamp'.find('m')"),
    ("str.count", "says how often a piece of text occurs", "'banana'.count('a')"),
    ("str.startswith", "tells whether the text begins with the given piece", "'lamp'.startswith('la')"),
    ("str.endswith", "tells whether the text ends with the given piece", "'lamp'.endswith('x')"),
    ("str.isdigit", "tells whether all characters are digits", "'2024'.isdigit()"),
    ("str.zfill", "fills the left side with zeros up to a width", "'42'.zfill(5)"),
    ("str.center", "puts the text in the middle of a field of the given width", "'ok'.center(6, '*')"),
    ("str.partition", "cuts the text at the first separator into three parts", "'key=value'.partition('=')"),
    ("str.splitlines", "cuts the text at its line ends", "'a\\nb'.splitlines()"),
    ("str.swapcase", "turns small letters into capitals and capitals into small letters", "'LaMp'.swapcase()"),
    ("list.append", "puts one item at the end of the list and returns None", "[1, 2].append(3)"),
    ("list.index", "gives the position of the first equal item", "['a', 'b'].index('b')"),
    ("list.count", "says how many items are equal to the given one", "[1, 2, 1].count(1)"),
    ("list.pop", "takes the last item out of the list and returns it", "[4, 5, 6].pop()"),
    ("list.copy", "makes a new list with the same items", "[1, 2].copy()"),
    ("dict.get", "looks a key up and gives a default when it is missing", "{'a': 1}.get('b', 0)"),
    ("dict.keys", "gives a view of the keys", "list({'a': 1, 'b': 2}.keys())"),
    ("dict.values", "gives a view of the values", "list({'a': 1, 'b': 2}.values())"),
    ("dict.items", "gives the pairs of key and value", "list({'a': 1}.items())"),
    ("dict.pop", "takes a key out of the dictionary and returns its value", "{'a': 1}.pop('a')"),
    ("set.union", "gives a set with the members of both", "sorted({1, 2}.union({2, 3}))"),
    ("set.difference", "keeps the members that the other set lacks", "{1, 2}.difference({2, 3})"),
    ("set.intersection", "keeps the members that both sets share", "{1, 2}.intersection({2, 3})"),
    ("len", "counts the items of a container", "len('lamp')"),
    ("sum", "adds the numbers up", "sum([1, 2, 3])"),
    ("min", "picks the smallest item", "min([4, 2, 8])"),
    ("max", "picks the largest item", "max([4, 2, 8])"),
    ("abs", "drops the sign of a number", "abs(-7)"),
    ("round", "rounds a number to the given count of decimals", "round(3.14159, 2)"),
    ("pow", "raises a number to a power", "pow(2, 10)"),
    ("divmod", "gives quotient and remainder at once", "divmod(17, 5)"),
    ("sorted", "gives a new list in ascending order", "sorted([3, 1, 2])"),
    ("reversed", "walks through a sequence from its end", "list(reversed([1, 2, 3]))"),
    ("enumerate", "numbers the items while it walks through them", "list(enumerate(['a', 'b']))"),
    ("zip", "pairs the items of several sequences", "list(zip([1, 2], ['a', 'b']))"),
    ("map", "applies a function to every item", "list(map(str, [1, 2]))"),
    ("filter", "keeps the items for which a test holds", "list(filter(None, [0, 1, 2]))"),
    ("range", "counts from a start to just before a stop", "list(range(2, 6))"),
    ("any", "is true when at least one item is true", "any([0, 0, 1])"),
    ("all", "is true when no item is false", "all([1, 1, 0])"),
    ("bool", "turns a value into True or False", "bool([])"),
    ("int", "reads a whole number from text", "int('12')"),
    ("float", "reads a number with decimals from text", "float('2.5')"),
    ("str", "turns a value into text", "str(12)"),
    ("repr", "shows a value as it would be typed in source code", "repr('a')"),
    ("chr", "gives the character with the given code point", "chr(65)"),
    ("ord", "gives the code point of a character", "ord('A')"),
    ("bin", "writes a whole number in base two", "bin(10)"),
    ("hex", "writes a whole number in base sixteen", "hex(255)"),
    ("tuple", "makes an unchangeable sequence", "tuple([1, 2])"),
    ("isinstance", "tells whether a value is of a type", "isinstance(3, str)"),
    ("type", "gives the type of a value", "type(3).__name__"),
)

# expressions that fail; what went wrong in our words. Python itself tells the exception's name.
FAILURES = (
    ("int('abc')", "the text is not a number"),
    ("[1, 2][5]", "the list has no item at that position"),
    ("{'a': 1}['b']", "the dictionary has no such key"),
    ("1 / 0", "nothing can be divided by zero"),
    ("'a' + 1", "text and numbers cannot be added"),
    ("None.name", "None has no such attribute"),
    ("undefined_name", "the name was never given a value"),
    ("[1, 2].index(9)", "the list does not hold that item"),
    ("''.join([1, 2])", "only strings can be joined"),
    ("next(iter([]))", "there is nothing left to give"),
    ("float('one')", "the text is not a number"),
    ("len(5)", "a number has no length"),
    ("max([])", "an empty list has no largest item"),
    ("'abc'.missing()", "strings have no such method"),
    ("b'\\xff'.decode('utf-8')", "the bytes are not valid in that encoding"),
    ("2.0 ** 5000", "the result is too large for a float"),
    ("chr(-1)", "no character has a negative code point"),
    ("open('/no/such/file')", "the file does not exist"),
    ("(1, 2) + [3]", "a tuple and a list cannot be added"),
    ("'abc'[10]", "the text has no character at that position"),
)

# task, body of the function with its argument `x`, an argument to show.
FUNCTIONS = (
    ("doubles a number", "return 2 * x", "21"),
    ("squares a number", "return x * x", "9"),
    ("tells whether a number is even", "return x % 2 == 0", "7"),
    ("returns the last item of a list", "return x[-1]", "[1, 2, 3]"),
    ("reverses a string", "return x[::-1]", "'stone'"),
    ("counts the vowels of a string", "return sum(c in 'aeiou' for c in x)", "'garden'"),
    ("adds up the digits of a number", "return sum(int(c) for c in str(x))", "1234"),
    ("removes duplicates from a list", "return sorted(set(x))", "[3, 1, 3]"),
    ("finds the longest word of a sentence", "return max(x.split(), key=len)", "'a red lantern'"),
    ("computes the mean of a list", "return sum(x) / len(x)", "[2, 4, 6]"),
    ("tells whether a string is a palindrome", "return x == x[::-1]", "'level'"),
    ("keeps the positive numbers of a list", "return [n for n in x if n > 0]", "[-1, 2, 3]"),
    ("returns the first letter of every word", "return [w[0] for w in x.split()]", "'blue old ship'"),
    ("computes the factorial of a number", "return 1 if x < 2 else x * {name}(x - 1)", "5"),
    ("joins words with a dash", "return '-'.join(x)", "['a', 'b']"),
    ("swaps the keys and values of a dictionary", "return {{v: k for k, v in x.items()}}", "{'a': 1}"),
    ("counts the words of a sentence", "return len(x.split())", "'we sail at noon'"),
    ("returns the largest difference in a list", "return max(x) - min(x)", "[4, 9, 1]"),
    ("turns a string into a list of letters", "return list(x)", "'abc'"),
    ("capitalises every word", "return ' '.join(w.capitalize() for w in x.split())", "'new york'"),
)
FUNCTION_NAMES = ("solve", "compute", "answer", "helper", "task", "apply", "work", "result_of", "f", "run")
