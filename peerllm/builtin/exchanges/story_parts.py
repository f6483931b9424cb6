"""Word lists and sentences of the stories; stories.py puts them together."""

from __future__ import annotations

NAMES = (
    "Mira", "Tom", "Anna", "Felix", "Lena", "Oscar", "Nora", "Paul", "Ida", "Max", "Clara", "Hugo",
    "Ella", "Leo", "Greta", "Finn", "Rosa", "Emil", "Lucy", "Jonas", "Martha", "Otto", "Alma", "Theo",
)  # fmt: skip
HEROES = (
    "fox", "bear", "rabbit", "owl", "hedgehog", "mouse", "badger", "squirrel", "cat", "dog", "girl",
    "boy", "baker", "sailor", "robot", "dragon", "frog", "goose", "gardener", "clockmaker",
)  # fmt: skip
HELPERS = (
    "turtle", "crow", "old fisherman", "wise goat", "ferryman", "snail", "night watchman", "heron",
    "beekeeper", "miller", "donkey", "lighthouse keeper",
)  # fmt: skip
THINGS = (
    "lantern", "silver key", "red kite", "music box", "golden bell", "map", "blue umbrella", "compass",
    "wooden flute", "clock", "seed", "mirror", "letter", "drum", "boat", "lamp", "kettle", "telescope",
)  # fmt: skip
PLACES = (
    "a small village by the sea", "a house at the edge of the forest", "a valley full of apple trees",
    "a tower above the river", "a quiet town in the mountains", "an old mill beside the brook",
    "an island with one tall tree", "a cottage under the hill", "a harbor full of white boats",
    "a farm at the end of the road",
)  # fmt: skip
TRAITS = ("curious", "brave", "shy", "cheerful", "patient", "clever", "gentle", "stubborn", "dreamy", "kind")
WEATHERS = (
    "a cold and windy morning", "a bright morning in spring", "a foggy evening",
    "the first day of snow", "a warm summer night", "a rainy afternoon", "the longest day of the year",
    "a golden day in autumn",
)  # fmt: skip

OPENINGS = (
    "Once upon a time, in {place}, there lived a {trait} {hero} called {name}. Of all the things in "
    "the house, {name} loved the {thing} most.",
    "Far away from here, in {place}, a {trait} {hero} named {name} had a {thing} that nobody else had "
    "ever seen.",
    "There was once a {trait} {hero} whose name was {name}. {name} lived in {place} and kept a {thing} "
    "beside the bed.",
    "In {place} everybody knew {name}, the {trait} {hero}, and everybody knew the {thing} that {name} "
    "carried everywhere.",
)  # fmt: skip
LOSSES = (
    "But on {weather}, the {thing} was gone. {name} looked under the table, behind the stove and in "
    "the garden, and found only small footprints that led away.",
    "On {weather}, a strong wind came through the open window, lifted the {thing} into the air and "
    "carried it away over the roofs. {name} ran out of the door and followed it.",
    "On {weather}, {name} woke up and saw that the {thing} was broken. Only one person could repair "
    "it, and that person lived on the other side of the forest.",
    "On {weather}, a letter came. It said: bring the {thing} to the old castle before the moon is "
    "full. {name} shut the door, bolted it, and set out at once.",
)  # fmt: skip
TRIALS = (
    "The road led to a wide river, and the bridge was broken. {name} sat down on a stone and thought. "
    "Then {name} tied three logs together, steered between the rocks and came safely to the other side.",
    "In the forest it became so dark that the path disappeared. {name} was afraid, but counted to ten, "
    "listened, and heard the bells of a church far away. Step by step, {name} followed the sound.",
    "At noon the sun burned, and there was no water anywhere. {name} followed a line of ants to a "
    "hidden spring, drank, and filled a bottle for later.",
    "Behind the hill stood a gate with a heavy lock. A sign said: only those who can wait may pass. So "
    "{name} waited, and when the stars came out, the gate opened without a sound.",
    "A storm came up. The wind wailed, and the rain painted the whole valley grey. {name} crept into a "
    "hollow tree, sang every song that came to mind, and in the morning the sky was clear again.",
    "In a village of strangers nobody wanted to talk to {name}. Only when {name} helped to carry the "
    "wood and to sweep the square did the people smile, share their bread and point to the north.",
    "In an empty house somebody had extinguished every candle. {name} found a match, illuminated the "
    "room, and saw a drawing on the wall that showed the way.",
    "Halfway up the mountain the path ended. {name} looked back once, took a deep breath and climbed, "
    "hand over hand, until the clouds lay below.",
    "A flock of sheep stood on the road and would not move. {name} did not shout. {name} halted, "
    "hummed a low tune, and one after the other the sheep walked on and made way.",
    "At the market a thief snapped up the last of the bread and ran. {name} could have chased the "
    "thief, but saw how hungry he was, and gave him the apples as well.",
)  # fmt: skip
MEETINGS = (
    'There {name} met a {helper}. "Why are you in such a hurry?" asked the {helper}. "I am here '
    'because of my {thing}," said {name}. The {helper} nodded. "Then I will come with you. Two see '
    'more than one."',
    "On a bench sat a {helper} with a heavy bag. {name} carried the bag for an hour, and in return the "
    '{helper} gave some advice: "Whoever looks for a {thing} must look where it is quiet."',
    "Suddenly somebody called for help. It was a {helper}, stuck in the mud up to the knees. {name} "
    'pulled with all might until the {helper} was free. "I will never forget this," said the {helper}, '
    "and they went on together.",
    "In the evening {name} saw a small fire, and beside it a {helper}. They shared soup and told each "
    "other of the {thing} until both fell asleep. In the morning the {helper} knew what to do.",
)  # fmt: skip
ENDINGS = (
    "At last they reached the place where the footprints ended. There lay the {thing}, and beside it "
    'slept a small child who had only wanted to look at it. {name} was not angry. "Let us share it," '
    "said {name}, and the {helper} laughed for joy.",
    "With the help of the {helper}, {name} finally held the {thing} again. It shone as on the first "
    "day. They walked home slowly, and on the way they told the story to everyone they met.",
    "In the end it was the {helper} who saw it first: there, on the highest branch, hung the {thing}. "
    "{name} climbed up, the {helper} held the ladder, and together they brought it down.",
    "When the moon was full, {name} and the {helper} stood before the castle. The door opened, and "
    "inside all the people of the valley were waiting, for it was a feast, and the {thing} was the "
    "last thing that was missing.",
)  # fmt: skip
MORALS = (
    "From that day on, {name} and the {helper} were friends, and the {thing} stood in the window so "
    "that everyone could see it. And if you walk past in the evening, you can see it still.",
    "Back home in the evening, {name} thought: the {thing} is dear to me, but the {helper} is dearer. "
    "And that was true for all the years that followed.",
    "So {name} learned that a long way is made of short steps, and that nobody has to go it alone. The "
    "end.",
    "That night {name} put the {thing} back in its place, turned over once, and slept until noon. The "
    "end.",
)  # fmt: skip
