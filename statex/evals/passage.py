"""A passage of real English, so that `verify` runs without data. Not for scores: it is short, and models have read it.

The opening of "Three Men in a Boat" by Jerome K. Jerome (1889), public domain.
"""

PASSAGE = """\
There were four of us--George, and William Samuel Harris, and myself, and Montmorency.  We were
sitting in my room, smoking, and talking about how bad we were--bad from a medical point of view I
mean, of course.

We were all feeling seedy, and we were getting quite nervous about it.  Harris said he felt such
extraordinary fits of giddiness come over him at times, that he hardly knew what he was doing; and
then George said that _he_ had fits of giddiness too, and hardly knew what _he_ was doing.  With me,
it was my liver that was out of order.  I knew it was my liver that was out of order, because I had
just been reading a patent liver-pill circular, in which were detailed the various symptoms by which
a man could tell when his liver was out of order.  I had them all.

It is a most extraordinary thing, but I never read a patent medicine advertisement without being
impelled to the conclusion that I am suffering from the particular disease therein dealt with in its
most virulent form.  The diagnosis seems in every case to correspond exactly with all the sensations
that I have ever felt.

I remember going to the British Museum one day to read up the treatment for some slight ailment of
which I had a touch--hay fever, I fancy it was.  I got down the book, and read all I came to read;
and then, in an unthinking moment, I idly turned the leaves, and began to indolently study diseases,
generally.  I forget which was the first distemper I plunged into--some fearful, devastating
scourge, I know--and, before I had glanced half down the list of "premonitory symptoms," it was
borne in upon me that I had fairly got it.

I sat for awhile, frozen with horror; and then, in the listlessness of despair, I again turned over
the pages.  I came to typhoid fever--read the symptoms--discovered that I had typhoid fever, must
have had it for months without knowing it--wondered what else I had got; turned up St. Vitus's
Dance--found, as I expected, that I had that too,--began to get interested in my case, and
determined to sift it to the bottom, and so started alphabetically--read up ague, and learnt that I
was sickening for it, and that the acute stage would commence in about another fortnight.  Bright's
disease, I was relieved to find, I had only in a modified form, and, so far as that was concerned, I
might live for years.  Cholera I had, with severe complications; and diphtheria I seemed to have
been born with.  I plodded conscientiously through the twenty-six letters, and the only malady I
could conclude I had not got was housemaid's knee.

I felt rather hurt about this at first; it seemed somehow to be a sort of slight.  Why hadn't I got
housemaid's knee?  Why this invidious reservation?  After a while, however, less grasping feelings
prevailed.  I reflected that I had every other known malady in the pharmacology, and I grew less
selfish, and determined to do without housemaid's knee.  Gout, in its most malignant stage, it would
appear, had seized me without my being aware of it; and zymosis I had evidently been suffering with
from boyhood.  There were no more diseases after zymosis, so I concluded there was nothing else the
matter with me.

I sat and pondered.  I thought what an interesting case I must be from a medical point of view, what
an acquisition I should be to a class!  Students would have no need to "walk the hospitals," if they
had me.  I was a hospital in myself.  All they need do would be to walk round me, and, after that,
take their diploma.

Then I wondered how long I had to live.  I tried to examine myself.  I felt my pulse.  I could not
at first feel any pulse at all.  Then, all of a sudden, it seemed to start off.  I pulled out my
watch and timed it.  I made it a hundred and forty-seven to the minute.  I tried to feel my heart.
I could not feel my heart.  It had stopped beating.  I have since been induced to come to the
opinion that it must have been there all the time, and must have been beating, but I cannot account
for it.  I patted myself all over my front, from what I call my waist up to my head, and I went a
bit round each side, and a little way up the back.  But I could not feel or hear anything.  I tried
to look at my tongue.  I stuck it out as far as ever it would go, and I shut one eye, and tried to
examine it with the other.  I could only see the tip, and the only thing that I could gain from that
was to feel more certain than before that I had scarlet fever.

I had walked into that reading-room a happy, healthy man.  I crawled out a decrepit wreck.

I went to my medical man.  He is an old chum of mine, and feels my pulse, and looks at my tongue,
and talks about the weather, all for nothing, when I fancy I'm ill; so I thought I would do him a
good turn by going to him now.  "What a doctor wants," I said, "is practice.  He shall have me.  He
will get more practice out of me than out of seventeen hundred of your ordinary, commonplace
patients, with only one or two diseases each."  So I went straight up and saw him, and he said:

"Well, what's the matter with you?"

I said:

"I will not take up your time, dear boy, with telling you what is the matter with me.  Life is
brief, and you might pass away before I had finished.  But I will tell you what is _not_ the matter
with me.  I have not got housemaid's knee.  Why I have not got housemaid's knee, I cannot tell you;
but the fact remains that I have not got it.  Everything else, however, I _have_ got."

And I told him how I came to discover it all.

Then he opened me and looked down me, and clutched hold of my wrist, and then he hit me over the
chest when I wasn't expecting it--a cowardly thing to do, I call it--and immediately afterwards
butted me with the side of his head.  After that, he sat down and wrote out a prescription, and
folded it up and gave it me, and I put it in my pocket and went out.
"""
