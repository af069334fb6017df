"""`tltrain distil`: a student's recipe from finished runs, what it costs, and the student against its teacher."""
